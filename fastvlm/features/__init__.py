"""What a frozen vision tower makes of images, kept on disk: later epochs and runs read it."""
