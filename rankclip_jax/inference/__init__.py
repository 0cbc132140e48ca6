"""A trained model at work: encoding (model), and collections of pictures to search in."""
