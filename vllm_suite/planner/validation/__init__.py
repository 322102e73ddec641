"""What the planner predicts beside what was measured or published, and beside what other tools say."""
