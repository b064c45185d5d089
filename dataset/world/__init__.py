"""The embedded world: objects (openmoji), scenes, their words, questions and inventories, and other drawings."""
