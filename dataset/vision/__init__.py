"""Pictures before they reach the model: decoding, the image processor, its cache of features, and tiles of large pictures."""
