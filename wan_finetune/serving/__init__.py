"""What serves an adapter to others: one generator; a Gradio Space, an Inference Endpoint and a local server use it."""
