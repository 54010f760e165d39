"""Models of the library transformers in local folders: checked before anything is loaded, no download, no pickle."""
