"""How functions run: the backend, the processor, compiled programs and their files."""
