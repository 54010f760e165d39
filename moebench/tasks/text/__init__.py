"""The data of the language task: documents, their split, their tokens and the windows that models read."""
