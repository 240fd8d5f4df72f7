"""Conversations' user turns, of which the model's answers were part of the default drafter's data.

    python prompts.py [COUNT] > prompts.jsonl     # 5,000; the first ones of any count are the same

Combined from the templates here and the subjects in words.json, always the same; none is taken from what drafters are measured with.
"""
# ruff: noqa: E501

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

SEED = 20261123
RANDOM = random.Random()
WORDS = SimpleNamespace(**json.loads(Path(__file__).with_name("words.json").read_text("utf-8")))
num, pick = RANDOM.randint, RANDOM.choice


def math() -> str:
    n, m, g, k = pick(WORDS.names), pick(WORDS.names), pick(WORDS.goods), num(3, 12)
    a, b = num(20, 60), num(2, 20)
    return pick(
        [
            f"{n} has {a} {g} and buys {b} more. Then {n} gives {num(1, 4)} to each of {num(2, 5)} friends. How many {g} are left?",
            f"A shop sells {g} for ${num(2, 15)} each. How much do {k} of them cost with a discount of {pick([5, 10, 15, 20, 25])}%?",
            f"{n} drives {num(40, 120)} miles in {pick(['1.5', '2', '2.5', '3'])} hours. What is the average speed, and how far does {n} get in {num(4, 8)} hours?",
            f"Solve for x: {num(2, 9)}x + {num(1, 30)} = {num(31, 90)}. Show each step.",
            f"A rectangle is {num(3, 30)} cm long and {num(2, 20)} cm wide. Find its area and perimeter.",
            f"{n} is {num(2, 9)} years older than {m}. The sum of their ages is {num(20, 60)}. How old are they?",
            f"Find the value of f({num(2, 6)}) if f(x) = {num(2, 5)}x^2 - {num(2, 9)}x + {num(1, 12)}.",
            f"A bag contains {num(2, 8)} red, {num(2, 8)} blue and {num(2, 8)} green balls. What is the probability of drawing a blue ball?",
            f"The shorter sides of a right triangle are {pick(['3 and 4', '6 and 8', '5 and 12', '8 and 15', '9 and 12', '7 and 24'])} cm long. How long is the hypotenuse?",
            f"Compute the mean and the median of {', '.join(str(num(1, 40)) for _ in range(num(5, 8)))}.",
            f"If {k} workers paint a house in {num(4, 14)} days, how long do {k * 2} workers need?",
            f"How many integers between {num(1, 20)} and {num(60, 200)} are divisible by {num(3, 9)}?",
            f"{n} saves ${num(10, 80)} every week. After how many weeks has {n} saved ${num(300, 2000)}?",
            f"Solve the system of equations: x + y = {num(8, 30)} and x - y = {num(1, 7)}.",
            f"Two dice are thrown. What is the probability that the sum is {num(3, 11)}?",
            f"In how many ways can {num(3, 7)} people stand in a line?",
            f"A circle has a radius of {num(2, 25)} cm. What are its circumference and its area?",
            f"Factor the polynomial x^2 + {b + k}x + {b * k}.",
            f"{n} puts ${num(2, 50) * 100} into a savings account with {num(2, 6)}% interest a year. How much is it after {num(2, 6)} years?",
            f"A train leaves at {num(6, 11)}:{pick(['05', '15', '20', '40', '50'])} and arrives {num(2, 5)} hours and {num(10, 55)} minutes later. When does it arrive?",
            f"Find the derivative of f(x) = {num(2, 6)}x^3 + {num(2, 9)}x^2 - {num(1, 20)}.",
            f"What is the remainder when {num(50, 400)} is divided by {num(6, 13)}?",
            f"Is {num(50, 200) * 2 + 1} a prime number? Explain how you know.",
            f"{n} cooks {num(2, 6) * 50} grams of rice for {num(2, 4)} guests. How many grams would {num(5, 12)} guests need?",
            f"{n} reads {num(10, 40)} pages a day. {m} reads {num(5, 15)} pages more. How many pages have they read together after {k} days?",
            f"A box has the edges {num(2, 12)}, {num(2, 12)} and {num(2, 12)} cm. What is its volume?",
            f"The price of a coat rises from ${num(4, 9) * 10} to ${num(10, 18) * 10}. By how many percent does it rise?",
        ]
    )


def arithmetic() -> str:
    a, b, c = num(45, 990), num(3, 99), num(2, 40)
    sums = f"{a} {pick('+-*')} {b}"
    return pick(
        [
            f"What is {sums}?",
            f"Calculate {sums} {pick('+-')} {c}.",
            f"{sums} = ?",
            f"Compute ({a} {pick('+-')} {b}) * {c} step by step.",
            f"What is {b * c} divided by {b}?",
            f"What is {pick([5, 8, 12, 15, 20, 25, 30, 35, 40, 60, 75])}% of {a}?{pick(['', ' Explain how you found it.'])}",
            f"Convert {b} {pick(['miles to kilometres', 'inches to centimetres', 'pounds to kilograms', 'degrees Celsius to Fahrenheit', 'degrees Fahrenheit to Celsius', 'gallons to litres', 'hours to minutes', 'days to hours', 'feet to metres', 'kilograms to grams'])}.",
            f"{pick(WORDS.names)} had {a} {pick(WORDS.goods)} and lost {c}. How many are left?",
            f"How many minutes are {c} hours and {num(1, 59)} minutes?",
            f"Add these numbers: {', '.join(str(num(1, 99)) for _ in range(num(3, 6)))}.",
            f"A ticket costs ${c}. How much do {b} tickets cost?",
            f"{c * num(3, 20)} {pick(WORDS.goods)} are shared by {num(3, 9)} children. How many does each get, and how many remain?",
            f"Write {num(1, 9)}/{num(10, 20)} as a decimal number and as a percentage.",
            f"Round {num(1, 99)}.{num(101, 999)} to one decimal place.",
            f"Which is larger: {num(1, 9)}/{num(10, 15)} or {num(1, 9)}/{num(16, 25)}?",
            f"What is {num(2, 20)} squared plus {num(2, 12)} squared?",
            f"The bill is ${b}.{pick(['20', '50', '80'])} and I want to tip {pick([10, 15, 18, 20])}%. What do I pay in total?",
            f"Count from {c} to {c + num(5, 9) * 3} in steps of three.",
            f"Order these numbers from small to large: {', '.join(str(num(1, 500)) for _ in range(num(4, 8)))}.",
        ]
    )


def reason() -> str:
    n, m, o = RANDOM.sample(WORDS.names, 3)
    cows, hens = num(3, 18), num(3, 18)
    day = pick(["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"])
    return pick(
        [
            f"{n} is taller than {m}. {m} is taller than {o}. Who is the shortest? Explain.",
            "All roses are flowers. Some flowers fade quickly. Can we conclude that some roses fade quickly? Explain your reasoning.",
            f"{n} sits left of {m}, and {o} sits right of {m}. Who sits in the middle?",
            f"{n}'s mother has three children: two are called {m} and {o}. What is the third child's name?",
            f"If it takes {num(2, 9)} minutes to boil one egg, how long does it take to boil {num(2, 9)} eggs in the same pot? Why?",
            f"Which word does not belong: {pick(['apple, banana, carrot, cherry', 'car, bus, bicycle, tree', 'piano, violin, hammer, flute', 'lion, tiger, eagle, wolf', 'oak, pine, rose, birch', 'nurse, doctor, surgeon, plumber', 'red, green, square, blue', 'Paris, Rome, Texas, Madrid', 'shirt, shoe, spoon, scarf'])}? Explain why.",
            f"A farmer has {cows + hens} animals, chickens and cows, with {4 * cows + 2 * hens} legs together. How many are there of each?",
            f"What is the next number in the series {pick(['2, 4, 8, 16', '1, 1, 2, 3, 5, 8', '3, 6, 9, 12', '1, 4, 9, 16, 25', '100, 90, 81, 73', '2, 3, 5, 7, 11', '81, 27, 9, 3', '1, 3, 7, 15, 31', '5, 10, 20, 40', '2, 6, 12, 20, 30'])}? Explain the rule.",
            f"Is the following argument valid? {pick(['If it rains, the street gets wet. The street is wet. Therefore it has rained.', 'All birds have wings. A bat has wings. So a bat is a bird.', 'Every member paid the fee. Lena did not pay. So Lena is not a member.', 'Nobody in my family smokes, so smoking is rare.', 'No fish can fly. A trout is a fish. So a trout cannot fly.'])}",
            f"You have a {num(3, 9)}-litre jug and a {num(10, 15)}-litre jug. How can you measure different amounts of water with them?",
            f"If today is {day}, what day will it be in {num(8, 60)} days?",
            f"{n} is the father or mother of {m}, and {m} is a cousin of {o}. How are {n} and {o} related?",
            f"{n}, {m} and {o} finished a race. {n} was not first, {m} was last. In which order did they arrive?",
            f"{n} says: 'I always lie.' Can that be true? Explain.",
            f"One of three boxes contains {pick(WORDS.goods)}. All labels are wrong. {n} may open one box. How can {n} find out what is where?",
            f"{n} walks {num(2, 9)} steps north, {num(2, 9)} steps east and {num(2, 9)} steps south. Where is {n} now, seen from the start?",
            f"{pick(['Hand is to glove as foot is to what?', 'Bird is to nest as bee is to what?', 'Book is to read as song is to what?', 'Day is to night as summer is to what?', 'Painter is to brush as writer is to what?'])} Explain the relation.",
            f"{n} left the house with an umbrella and came back with wet hair. Give three possible explanations.",
            f"What would happen if {pick(['the Earth stopped turning', 'nobody needed sleep', 'all insects disappeared', 'money did not exist', 'people could read thoughts', 'the oceans rose by ten metres', 'everyone spoke the same language', 'cars could fly'])}? Think step by step.",
            f"{n} has more {pick(WORDS.goods)} than {m}, and {o} has fewer than {m}. Who has the most? Answer with one name and one sentence.",
        ]
    )


def writing() -> str:
    t, p, s = pick(WORDS.topics), pick(WORDS.places), pick(WORDS.story)
    if RANDOM.random() < 0.3:
        return pick(
            [
                f"Write a {pick(['haiku', 'limerick', 'rhyming poem of four lines', 'song with a chorus', 'free verse poem'])} about {pick([t, p, s])}.",
                f"Give me {num(5, 12)} creative names for {pick(WORDS.things)} and explain each.",
                f"Write the first paragraph of a novel about {s}.",
                f"i need a quick text message to {pick(WORDS.people)}, {pick(WORDS.occ)}",
                f"Write {num(3, 5)} slogans for {pick(WORDS.things)}.",
                f"Write a social media post about {pick([t, p, pick(WORDS.things)])} with three hashtags.",
                f"Suggest an outline for an essay about {t}.",
                f"Write a postcard from {p}.",
                f"Invent a surprising ending for a story about {s}.",
            ]
        )
    return pick(
        [
            f"Write a blog post about a weekend trip to {p}, with tips for food and sights.",
            f"Write a short story about {s}.",
            f"Tell me a story about {s}.",
            f"Write a persuasive essay about {t}, with an introduction, arguments and a conclusion.",
            f"Draft an email to {pick(WORDS.people)}, {pick(WORDS.occ)}.",
            f"Write a product description for {pick(WORDS.things)}.",
            f"Write a poem about {pick([t, p, s])}.",
            f"Compose a speech of two minutes about {t}.",
            f"Write a balanced article on the advantages and disadvantages of {t}.",
            f"Write a letter to {pick(WORDS.people)}, {pick(WORDS.occ)}.",
            f"Describe a busy market on a trip to {p} so that the reader can smell and hear it.",
            f"Write a dialogue between {pick(WORDS.roles)} and {pick(WORDS.roles)} about {t}.",
            f"Write an advertisement for {pick(WORDS.things)}.",
            f"Write a customer review of {pick(WORDS.things)}, {pick(['very happy', 'disappointed', 'with mixed feelings', 'ironic'])} in tone.",
            f"Write a diary entry of {pick(WORDS.roles)}.",
            f"Write a press release about {pick(WORDS.things)}.",
            f"Write a scene for the theatre about {s}.",
            f"Write a fairy tale in which {pick(WORDS.roles)} meets {pick(WORDS.roles)}.",
        ]
    ) + pick(WORDS.lengths)


def roleplay() -> str:
    r, t = pick(WORDS.roles), pick(WORDS.topics)
    return pick(
        [
            f"Pretend to be {r}. Introduce yourself and tell me about your day.",
            f"You are {r}. What is your opinion about {t}?",
            f"Act as {r} and give me advice: {pick(['I cannot decide whether to change my job', 'I had a quarrel with my sister', 'I am afraid of flying', 'I never finish what I begin', 'I spend too much money', 'I feel lonely in a new town'])}.",
            f"Imagine you are {r}. Explain {pick(WORDS.science)} in your own way.",
            f"Take the role of {r}. I am a customer who is not satisfied. How do you answer?",
            f"Speak like {r} and describe {pick(WORDS.places)}.",
            f"Let's play a game: you are {r}, I am {pick(WORDS.roles)}. You begin.",
            f"As {r}, tell me about the strangest thing that ever happened to you.",
            f"Answer as {r} would: {pick(['what is courage?', 'how do I become happy?', 'what do you fear?', 'what would you change in the world?', 'who was your best friend?', 'what is your secret?'])}",
            f"You're {r}. Write a short letter to {pick(WORDS.roles)}.",
            f"Pretend to be {r} who gives a lecture about {pick(WORDS.hist + WORDS.human)}.",
            f"Stay in the role of {r}: what do you think of {pick(WORDS.things)}?",
            f"Be {r} for a moment and recommend me a book, a dish and a place.",
            f"Interview {r} about {t}. Write three questions and the answers.",
        ]
    )


def coding() -> str:
    task, lang = pick(WORDS.code), pick(WORDS.langs)
    return pick(
        [
            f"Write a {lang} function that {task}.",
            f"Write a {lang} program that {task}, with comments.",
            f"Implement in {lang} a function that {task}. Then explain its time complexity.",
            f"Write a {lang} function that {task} and show how to test it.",
            f"I need {lang} code that {task}. Only code, please.",
            f"how do i write code that {task} in {lang}?",
            f"Explain step by step how a {lang} function that {task} can be written, then give the code.",
            f"Write pseudocode for a program that {task}.",
            f"Write unit tests for a Python function that {task}.",
            f"Show two different ways to write a {lang} function that {task}, and compare them.",
            f"Give me a {lang} class with a method that {task}.",
            f"Which edge cases should I consider in a function that {task}?",
            f"What does this code do?\n\n{pick(WORDS.snippets)}",
            f"Explain this code to a beginner: {pick(WORDS.snippets)}",
            f"Rewrite this code so that it is easier to read:\n\n{pick(WORDS.snippets)}",
            f"What is wrong with this code?\n\n{pick(WORDS.bugs)}",
            f"My code doesn't work. Find the bug and correct it: {pick(WORDS.bugs)}",
            f"What is the difference between {pick(['a list and a tuple in Python', 'an array and a linked list', 'TCP and UDP', 'a process and a thread', 'SQL and NoSQL databases', 'git merge and git rebase', 'let and var in JavaScript', 'a class and an object', 'recursion and iteration', 'a stack and a queue', 'GET and POST', 'HTTP and HTTPS', 'an interface and an abstract class in Java', 'shallow and deep copies', 'unit tests and integration tests'])}? Give an example.",
            f"Write a web page in HTML with {pick(['a button that changes the colour of the background', 'a list of three links', 'a table of five countries and their capitals', 'a form for a newsletter', 'a clock that shows the time', 'a picture gallery', 'a menu at the top', 'a calculator for tips', 'a contact form with validation'])}.",
            f"Write an SQL query that {pick(['lists the ten best customers by sales', 'counts the orders of each month', 'finds employees who earn more than the average', 'joins students with their courses', 'deletes rows that are older than a year', 'finds duplicate e-mail addresses', 'shows products that were never sold', 'adds a column for the date of birth'])}.",
            f"Write a shell command that {pick(['finds all files larger than 100 MB', 'counts the lines of all Python files', 'renames .txt files to .md', 'shows the five largest folders', 'replaces a word in a file', 'lists running processes by memory'])}, and explain it.",
            f"Explain {pick(['unit testing', 'version control', 'object-oriented programming', 'recursion', 'regular expressions', 'exceptions in Python', 'pointers in C', 'REST APIs', 'asynchronous code in JavaScript', 'database indexes', 'Docker containers', 'big O notation', 'type hints in Python', 'continuous integration'])} with a small example.",
        ]
    )


def passage() -> tuple[str, str]:
    """A text, and a question about it."""
    text, *own = pick(WORDS.texts).split(" # ")
    return text, pick(own * 3 + WORDS.questions)


def extraction() -> str:
    text, question = passage()
    if RANDOM.random() < 0.3:
        rows = [f"{pick(WORDS.names)}, {num(18, 70)}, {pick(WORDS.countries)}" for _ in range(num(3, 6))]
        return (
            pick(
                [
                    "Convert these lines (name, age, country) to JSON:",
                    "Make a table in Markdown of these people with name, age and country:",
                    "Who is the oldest person in this list, and where does this person live?",
                    "Sort these entries by age and give them back as CSV with a header:",
                    "Which countries occur in this data? Return a list in alphabetical order.",
                ]
            )
            + "\n\n"
            + "\n".join(rows)
        )
    task = pick(
        [
            "Extract all numbers from the following text and say what each one means, as JSON.",
            "List the people, places and organizations in this text.",
            f"Read the text and answer: {question}",
            "Turn the following text into a table with the columns 'fact' and 'detail'.",
            "Classify the tone of the following text as positive, negative or neutral and explain why.",
            "Write five questions and answers about this passage.",
            "Extract all dates and times from the text. Answer 'none' if there are none.",
            "Return a JSON object with the keys 'topic', 'people' and 'numbers' for this text.",
            "List the five most important keywords of the text, separated by commas.",
            "Which sentences of this text are facts, and which are opinions?",
            "Find all adjectives in the text.",
            "Which category fits best: news, story, science, business, letter or manual? Give a reason.",
            "Put the events of the text in order as a numbered list.",
            "Rate the text from 1 to 5 for how positive it is. Return only the number.",
            "Write the facts of this text as CSV lines of the form subject,property,value.",
        ]
    )
    return pick([f"{task}\n\n{text}", f"{text}\n\n{task}"])


def summarise() -> str:
    text = passage()[0]
    task = pick(
        [
            "Sum this text up in two sentences.",
            "Summarize this text in a short paragraph.",
            "What are the key points of this text?",
            "Give a brief summary of the passage below.",
            "Summarize this article as three bullet points.",
            "Explain this text to a child.",
            "Write a headline and a one-sentence summary for this text.",
            "Summarize this in exactly one sentence.",
            "tl;dr?",
            "Shorten the text to about 30 words.",
            "Summarize the text for a busy manager.",
            "Sum up the text in your own words.",
            "What is the most important message of this text?",
            "Make a short social media post out of this text.",
            "Summarize the text, leaving out all numbers.",
            "Give me the gist in no more than 20 words.",
            "Suggest three titles for this text.",
            "Write a summary in a formal tone.",
        ]
    )
    return pick([f"{task}\n\n{text}", f"{text}\n\n{task}", f'{task} "{text}"'])


def answer() -> str:
    text, question = passage()
    how = pick(
        [
            "Answer the question using the text below.",
            "Use only the passage to answer.",
            "Read the passage, then answer the question.",
            "Give a short answer based on the text.",
            "Answer in a full sentence.",
            "Quote the sentence that answers the question.",
            "If the text does not say it, answer 'unknown'.",
        ]
    )
    return pick(
        [
            f"{how}\n\nText: {text}\n\nQuestion: {question}",
            f"{text}\n\n{question}",
            f"{question}\n\n{text}",
            f"Context: {text}\n\nQuestion: {question}\nAnswer:",
            f"{how}\n\n{text}\n\n{question}",
        ]
    )


def factual() -> str:
    fact, where = pick(WORDS.facts), pick(WORDS.countries)
    return pick(
        [
            fact,
            f"{fact} Answer in one sentence.",
            f"{fact} Tell me a little more about it, too.",
            f"Quick question: {fact[0].lower()}{fact[1:]}",
            f"For a quiz: {fact[0].lower()}{fact[1:]} And how sure are you?",
            f"What is the capital of {where}?",
            f"Which languages are spoken in {where}?",
            f"On which continent is {where}, and what are its neighbours?",
            f"What is {where} famous for?",
            f"Name three cities in {where}.",
            f"Who was {pick(WORDS.figures)}?",
            f"Who was {pick(WORDS.figures)}, and why is this person remembered?",
            f"When and where was {pick(WORDS.figures)} born?",
            f"Give me five facts about {pick([where, *WORDS.figures])}.",
            f"Write a short biography of {pick(WORDS.figures)}.",
            f"True or false: {pick(['spiders are insects', 'the Sun is a star', 'bats are blind', 'sound travels faster than light', 'tomatoes are fruits', 'gold is heavier than iron', 'sharks are mammals', 'Venus is hotter than Mercury', 'glass is made from sand', 'penguins live at the North Pole', 'the heart is a muscle', 'lightning never strikes twice'])}? Explain.",
        ]
    )


def stem() -> str:
    s = pick(WORDS.science)
    if RANDOM.random() < 0.3:
        return pick(
            [
                f"explain {s} like i'm five",
                f"Explain {s} in three sentences.",
                f"Write five quiz questions about {s}, with answers.",
                f"What are open questions about {s}?",
                f"Make a glossary of six terms that have to do with {s}.",
            ]
        )
    return pick(
        [
            f"Explain {s} to a high school student.",
            f"What should everyone know about {s}?",
            f"Describe the basic ideas behind {s}, step by step.",
            f"What are common misconceptions about {s}?",
            f"Give an overview of {s} with two examples from everyday life.",
            f"How would you design an experiment about {s}?",
            f"What is the relation between {s} and {pick(WORDS.science)}?",
            f"Why do scientists study {s}? Name three applications.",
            f"How did scientists find out about {s}?",
            f"Help me understand {s}. Start with the basics.",
            f"What mistakes do students make in exams about {s}?",
        ]
    ) + pick(WORDS.styles)


def humanities() -> str:
    h, e = pick(WORDS.hist + WORDS.human), pick(WORDS.hist)
    if RANDOM.random() < 0.3:
        return pick(
            [
                f"Write a lesson plan for teaching {h} to teenagers.",
                f"Make a timeline of {e} with at least five dates.",
                f"Give a short introduction to {h}.",
                f"Write three exam questions about {h} and sketch good answers.",
                f"what's {pick(WORDS.human)} about? short answer please",
            ]
        )
    return pick(
        [
            f"What were the main causes and effects of {e}?",
            f"Explain {pick(WORDS.human)} with examples.",
            f"Compare {e} and {pick(WORDS.hist)}.",
            f"Discuss the importance of {h} for today's world.",
            f"Tell me about {h}, and name some key figures.",
            f"How did {e} change the lives of ordinary people?",
            f"How do scholars disagree about {h}?",
            f"Which books or sources would you recommend about {h}, and why?",
            f"How would a critic describe {pick(WORDS.human)}?",
            f"What can we learn from {e}?",
        ]
    ) + pick(WORDS.styles)


def translate() -> str:
    s, t, f = pick(WORDS.sent), pick(WORDS.tongues), pick(WORDS.foreign)
    return pick(
        [
            f"Translate into {t}: {s}",
            f'How do you say in {t}: "{s}"',
            f"Translate the following sentence into {t} and explain the grammar: {s}",
            f"Translate to {t}: {s} {pick(WORDS.sent)}",
            f"{s}\n\nTranslate this into {t}.",
            f"Please translate this sentence to {t} and to {pick(['Swedish', 'Polish', 'Latin'])}: {s}",
            f"What is '{pick(['good morning', 'thank you very much', 'see you tomorrow', 'I am hungry', 'where is the station', 'how much is it', 'happy birthday', 'excuse me', 'good luck', 'the house', 'the bread', 'water', 'my friend'])}' in {t}?",
            f"Translate into English: {f}",
            f"Translate this sentence into English, and explain difficult words: {f}",
            f'What does this mean in English? "{f}"',
            f"Which language is this, and what does it mean: {f}",
            f"{f}\n\nIn English, please.",
            f"Translate to English: {f} {pick(WORDS.foreign)}",
        ]
    )


def rewrite() -> str:
    s, b = pick(WORDS.sent), pick(WORDS.broken)
    return pick(
        [
            f"Edit the following text for grammar and style: {b}.",
            f"Correct the mistakes: {b}",
            f"Is this sentence correct? If not, correct it and explain the mistakes. {b}",
            f"Paraphrase this sentence: {s}",
            f"Give three different ways to say: {s}",
            f"Rewrite in a more {pick(['formal', 'casual', 'dramatic', 'poetic', 'polite', 'humorous'])} style: {s}",
            f"Put this sentence into the {pick(['past tense', 'future tense', 'negative form', 'form of a question'])}: {s}",
            f"Find the nouns and verbs in this sentence: {s}",
            f"Continue the story in five sentences: {s}",
            f"Rewrite this text in {pick(['simple words', 'the first person', 'a funny way', 'the style of a news report', 'the style of a fairy tale', 'half the length'])}:\n\n{passage()[0]}",
            f"Replace as many words as you can by synonyms: {s}",
            f"Make one sentence of these two: {s} {pick(WORDS.sent)}",
            f"Write a reply to someone who says: {s}",
            f"What is the subject of this sentence, and what is the object? {s}",
        ]
    )


def enumerate_things() -> str:
    what, (one, two) = pick(WORDS.listed), pick(WORDS.versus).split(" | ")
    return pick(
        [
            f"List {num(4, 10)} {what}.",
            f"Give me a list of {num(4, 8)} {what}, with one sentence for each.",
            f"Name {num(3, 6)} {what} as a JSON array.",
            f"Make a table of {num(4, 6)} {what}, with a short comment in the second column.",
            f"Brainstorm {what}. Which one is the best, and why?",
            f"Compare {one} and {two}.",
            f"{one[0].upper()}{one[1:]} or {two}: which do you prefer, and why?",
            f"What is the difference between {one} and {two}?",
            f"Make a table that compares {one} and {two}.",
            f"Name two things that {one} and {two} have in common and two in which they differ.",
            f"Help me choose between {one} and {two}.",
        ]
    )


def define() -> str:
    w = pick(WORDS.words)
    return pick(
        [
            f"What does the word '{w}' mean?",
            f"Define '{w}' and use it in a sentence.",
            f"Give synonyms and antonyms of '{w}'.",
            f"Explain the word '{w}' to a child.",
            f"Where does the word '{w}' come from?",
            f"What is the difference between '{w}' and '{pick(WORDS.words)}'?",
            f"Write a sentence that contains both '{w}' and '{pick(WORDS.words)}'.",
            f"What does the saying '{pick(['break the ice', 'once in a blue moon', 'a piece of cake', 'spill the beans', 'the early bird catches the worm', 'actions speak louder than words', 'better late than never', 'bite the bullet', 'hit the nail on the head', 'under the weather', 'let the cat out of the bag', 'too many cooks spoil the broth', 'every cloud has a silver lining', 'burn the midnight oil'])}' mean?{pick(['', ' Give an example.', ' When do people use it?'])}",
        ]
    )


def life() -> str:
    t, tip, dish = pick(WORDS.topics), pick(WORDS.tips), pick(WORDS.dishes)
    return pick(
        [
            f"What are some tips for {tip}?",
            f"Give me {num(3, 8)} tips for {tip}, each in one sentence.",
            f"I need help with {tip}. Where do I begin?",
            f"Which mistakes should I avoid when it comes to {tip}?",
            f"What should I know before I visit {pick(WORDS.places)}?",
            f"Plan a trip of {num(2, 10)} days to {pick(WORDS.places)} for {pick(['a couple', 'a family with two kids', 'a student', 'three friends', 'my parents'])}.",
            f"What food should I try when I visit {pick(WORDS.places)}?",
            f"Explain the pros and cons of {t}.",
            f"What do you think about {t}?",
            f"What has changed about {t} over the last fifty years?",
            f"Give me a recipe for {dish}.",
            f"What ingredients do I need for {dish}? Just the shopping list.",
            f"How can I make {dish} for {num(2, 10)} people {pick(['without dairy', 'in half an hour', 'on a small budget', 'without an oven', 'a bit spicier', 'for children'])}?",
            f"Make a {pick(['weekly', 'daily', 'monthly'])} plan for {pick(WORDS.plans)}.",
            f"Write a checklist for {pick(WORDS.plans)}.",
            f"How much time should I set aside for {pick(WORDS.plans)}?",
            pick(WORDS.chats),
            f"{pick(['Hey', 'Hi', 'Hello', 'Good evening'])}! Let's chat about {t}.",
        ]
    )


kinds = [
    *[writing] * 4,
    *[roleplay] * 3,
    *[reason] * 2,
    *[math] * 3,
    *[arithmetic] * 3,
    *[coding] * 4,
    *[extraction] * 3,
    *[stem] * 3,
    *[humanities] * 3,
    *[summarise] * 3,
    *[answer] * 3,
    *[factual] * 2,
    *[translate] * 3,
    *[rewrite] * 2,
    *[enumerate_things] * 2,
    define,
    *[life] * 3,
]


def conversations(count: int) -> list[list[str]]:
    """``count`` times four user turns; the first ones go through all kinds."""
    RANDOM.seed(SEED)
    seen: set[str] = set()
    found = []
    for i in range(count):
        turns: list[str] = []
        for j in range(4):
            for attempt in range(40):
                if j == 1 and RANDOM.random() < 0.35:
                    turn = pick(WORDS.more)
                else:
                    turn = kinds[i % len(kinds)]() if j == 0 and attempt < 20 else pick(kinds)()
                if turn in WORDS.more or turn not in seen:
                    break
            seen.add(turn)
            turns.append(turn)
        found.append(turns)
    return found


if __name__ == "__main__":
    for turns in conversations(int(sys.argv[1]) if len(sys.argv) > 1 else 5000):
        print(json.dumps({"turns": turns}))
