"""What a model can do: accuracy on tasks, perplexity of texts, and lm-eval-harness."""
