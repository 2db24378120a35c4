"""Run pruned models without their zeros on a CPU.

``model`` is the door. ``graph`` tells what a model computes, and ``plan`` turns that
into ``steps``. ``geometry`` lays values out in memory. ``convolution`` turns the
weights of a layer into what a kernel reads. ``code`` writes kernels in LLVM's language
and compiles them.

May import ``structure`` and the rooms below it.
"""
