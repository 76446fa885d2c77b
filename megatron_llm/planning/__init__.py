"""Models of cost (FLOPs, time, activations) and what a step would take by them: tables and pictures of pipelines."""
