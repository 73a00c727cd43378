"""Run functions of models here: backend, processor, compiled programs and their files."""
