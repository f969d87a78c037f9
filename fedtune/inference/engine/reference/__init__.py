"""The engine's decoder by torch: the reference of the native code, and its fallback. Imports here load torch."""
