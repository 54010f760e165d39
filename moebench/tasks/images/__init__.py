"""The data of the vision task: images, their split, their augmentation in training, and the few-shot probe."""
