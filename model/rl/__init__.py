"""What stage 3 minimises by rules: advantages, algorithms, and the leaves that some runs add (KL, critic, dynamic clipping)."""
