"""Long-context tasks: LongBench, ZeroSCROLLS, SynthWiki and RULER-style generators, each with two measures.

A generated answer is scored by the task's own metric; because small models score low when they generate, the
log-likelihood of the reference answer is measured too, over the same compressed prompt.
"""
