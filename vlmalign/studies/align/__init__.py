"""The general recipe: SFT, DPO, GRPO and PPO on the user's own JSON Lines, one stage after the other in one run folder."""
