"""Neural Matching Fields (Hong et al., NeurIPS 2022): cost embedding, matching field, search."""
