"""What happens while the host samples: tables of modulations, recording, timing."""
