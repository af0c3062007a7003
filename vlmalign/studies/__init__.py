"""The papers as pipelines of the parts in the other rooms."""
