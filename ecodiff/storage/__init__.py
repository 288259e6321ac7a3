"""What is kept on disk: where, whole or not at all, under which hash. Nothing here knows a pipeline."""
