"""The job that a person runs, whole: a caption, a batch of photos, a step of fine-tuning."""
