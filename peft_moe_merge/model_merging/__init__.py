"""What all ways to merge fine-tuned models share; `static` holds those that give one set of weights."""
