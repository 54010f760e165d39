"""The data of the tasks on audio: clips, their split, their features and their transcripts."""
