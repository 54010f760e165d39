"""Tasks of lm-eval and local ones on trained models: results by item, and arms compared over seeds and items."""
