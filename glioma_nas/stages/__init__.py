"""One module for each stage of the pipeline, each with ``run(context) -> results``."""
