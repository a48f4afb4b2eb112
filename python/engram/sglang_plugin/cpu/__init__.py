"""What stock SGLang needs to serve on a machine without an accelerator."""
