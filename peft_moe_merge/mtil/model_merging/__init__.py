"""Fine-tune one CLIP on several tasks, merge the copies in every way there is, and compare."""
