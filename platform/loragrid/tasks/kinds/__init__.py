"""One file per task kind; the file's name is the value of `task.kind`."""
