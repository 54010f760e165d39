"""The data of the vision task: images, their split, what training does to them, and the probe on few of them."""
