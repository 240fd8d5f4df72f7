"""The common core: pure functions of arrays that know no device, no file and no model."""
