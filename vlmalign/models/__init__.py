"""Decoder, vision tower, families and adapters: from a group of tokens to the states that predict it."""
