"""What is done to adapters after training: merging several, extracting one, other ranks, other strengths."""
