"""Objectives side by side: each over several seeds, on one data set and budget, from data that lies on the device."""
