"""What is lost, and what readers notice, when nodes die and bytes change."""
