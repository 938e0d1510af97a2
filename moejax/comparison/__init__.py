"""Dense and mixture-of-experts models at equal step time: measured, matched, trained, and reported."""
