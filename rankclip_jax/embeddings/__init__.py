"""Embeddings of whole collections: pictures by number, files of embeddings, and a search by text."""
