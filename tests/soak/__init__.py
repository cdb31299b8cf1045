"""Hours of a tunnel's life in minutes: churn through both kinds of forward, and nothing that grows."""
