"""The benchmark: a CLIP learns one image task after another. It knows the library; the library never knows it."""
