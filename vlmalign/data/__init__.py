"""Files -> examples -> prompts -> groups. numpy only: nothing in this room imports JAX."""
