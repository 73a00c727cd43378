"""Run functions of models: the backend, the processor, compiled programs and their files."""
