"""The papers' experiments: what they were, as data; what they cost here, and how they came out."""
