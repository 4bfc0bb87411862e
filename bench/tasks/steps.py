"""The task `steps`: a chain of nine sums and products. Each one, except the first, starts with the last digit of the
previous result (p) or of the one before that (q). The answer writes out every step:

    prompt  7+5=??;p*3=??;q*7=??;p+4=??;q+4=??;...
    answer  7+5=12;2*3=06;2*7=14;4+4=08;4+4=08;...

Every operation maps the ten possible starting digits to ten different last digits, so no result can be known without
the one that it starts from. More than half of an answer's tokens can be copied from the prompt at once. The others form
a chain of four to eight links, so the least number of forwards depends on the problem.
"""

import random

STEPS = 9
TOKENS = 64  # in an answer: one per character, and end-of-text
OPERATIONS = (*(("+", n) for n in (1, 2, 4, 5, 6, 8)), *(("*", n) for n in (3, 7, 9)))


def problem(draw: random.Random) -> tuple[str, str]:
    """Prompt and answer, 63 characters each."""
    prompt, answer, results = [], [], []
    for i in range(STEPS):
        back = draw.choice((1, 2)[:i]) if i else 0
        first = results[-back] % 10 if back else draw.randrange(10)
        sign, second = draw.choice(OPERATIONS)
        results.append(first + second if sign == "+" else first * second)
        prompt.append(f"{(first, 'p', 'q')[back]}{sign}{second}=??;")
        answer.append(f"{first}{sign}{second}={results[-1]:02d};")
    return "".join(prompt), "".join(answer)
