"""Where fused_align plugs into other libraries; each module imports its library, so import what you use."""
