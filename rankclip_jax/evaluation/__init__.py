"""What a trained model can do: evaluations that the trainer and --mode=eval share."""
