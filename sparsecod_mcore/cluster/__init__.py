"""Starting a training job where a scheduler put its processes, and telling the scheduler whether it is alive."""
