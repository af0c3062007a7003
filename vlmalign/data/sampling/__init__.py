"""Drawing small sets in which every label has enough films."""
