"""Data: loading, schemas, tokenisation, packing, denoising and padding."""
