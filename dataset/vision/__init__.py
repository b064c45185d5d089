"""Pictures on their way to the model: the image processor, its cache of features, and tiles of large pictures."""
