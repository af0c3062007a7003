"""Film files to the pixels of a vision tower: decoding, resizing, caching, reading ahead."""
