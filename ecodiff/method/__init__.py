"""The paper, to be read in this order: sites, hard_concrete, gates, hooks, checkpointing, trajectory, config, learn,
resume, mask, surgery, pruned, generate. Every name that a user needs is a name of ``ecodiff`` itself.
"""
