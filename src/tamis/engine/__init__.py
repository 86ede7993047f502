"""The engine: scheduler, step, sampler; `Engine.step()` is the heart of tamis."""
