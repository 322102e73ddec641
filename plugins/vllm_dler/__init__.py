"""Length-aware scheduling inside an unmodified vLLM: short requests first, long ones within a bound."""
