"""Conversations' user turns, of which the model's answers were part of the default drafter's data.

    python benchmarks/training_prompts.py > prompts.jsonl

Combined from templates and subjects, always the same; none is taken from what drafters are measured with.
"""
# ruff: noqa: E501

import json
import random

SEED = 20261123
RANDOM = random.Random()


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


places = lines("""Lisbon
Kyoto
the Scottish Highlands
Marrakesh
Vancouver
New Zealand's South Island
Istanbul
the Amalfi coast
Cape Town
Iceland
Buenos Aires
Prague
the Norwegian fjords
Vietnam
New Orleans
Mexico City
the Greek islands
Bali""")
topics = lines("""remote work
school uniforms
public libraries
electric cars
learning an instrument
artificial intelligence in medicine
sleep
urban gardening
social media and teenagers
space exploration
fast fashion
renewable energy
online education
vegetarian diets
video games
tourism
privacy on the internet
homework
city traffic
recycling
volunteering
climate change
exercise
money management for students
self-driving cars
reading books""")
science = lines("""photosynthesis
black holes
the water cycle
DNA replication
plate tectonics
vaccines
entropy
the periodic table
neural networks
natural selection
acids and bases
electromagnetic induction
the greenhouse effect
nuclear fusion
the immune system
gravity waves
chemical equilibrium
the structure of the atom
antibiotic resistance
osmosis
semiconductors
the Doppler effect
enzymes
Newton's laws of motion
stars and how they die
the carbon cycle
genetic engineering
superconductors
relativity
the nervous system""")
hist = lines("""the French Revolution
the fall of the Roman Empire
the Industrial Revolution
the Silk Road
the Cold War
the Renaissance
the abolition of slavery
the Great Depression
the printing press
the Ottoman Empire
decolonization in Africa
the Enlightenment
the women's suffrage movement
the Black Death
the Meiji Restoration
the Vietnam War
the Bretton Woods system
the Protestant Reformation
the New Deal
ancient Athens
the partition of India
the Treaty of Versailles""")
human = lines("""inflation
utilitarianism
supply and demand
the social contract
globalization
cognitive dissonance
free trade
existentialism
monetary policy
the rule of law
opportunity cost
Shakespeare's tragedies
stoicism
the separation of powers
unemployment
confirmation bias
the gross domestic product
modern art
human rights
marketing ethics""")
roles = lines("""a wise old sea captain
a strict but kind math teacher
a time traveller from the year 2300
Sherlock Holmes
a chef who owns a small restaurant in Paris
a personal fitness trainer
a friendly dragon
Albert Einstein
a stand-up comedian
a travel agent
a medieval knight
a career counselor
a robot that has just woken up
a football coach before the final
Cleopatra
a grumpy cat
a nutritionist
an astronaut on the Moon
a detective in a film noir
Benjamin Franklin
a poet in love with the sea
a financial adviser
a veterinarian
a bartender who listens to everyone""")
things = lines("""a foldable bicycle
a smart water bottle
a new coffee shop
a language learning app
noise-cancelling headphones
an online bookshop
a solar backpack
a dog walking service
a yoga studio
a robot vacuum cleaner
a children's museum
a vegan restaurant
a mystery novel
a standing desk
a second-hand clothing store
a hiking club""")
story = lines("""a lighthouse keeper who finds a letter in a bottle
two sisters who inherit a clock shop
a boy who can hear what trees think
the last train of the night
a dog who travels across the country
a village where it never stops raining
an astronaut who gets an unexpected visitor
a librarian who discovers a hidden room
a robot that wants to paint
an old man and his chess partner
a girl who befriends a storm
a thief with a conscience
a painting that changes every night
a market at the end of the world
a violin that nobody can play""")
people = lines("""your boss
a new colleague
a customer whose order is late
your landlord
a professor
an old friend
the city council
your team
a job applicant
a neighbour""")
occ = lines("""asking for a day off
explaining a delay of the project
inviting them to a meeting next Tuesday
thanking them for their help
asking for feedback on a report
apologizing for a mistake in an invoice
proposing a new idea
complaining politely about noise
announcing a change of plans
asking for a recommendation letter""")
code = lines("""checks whether a string is a palindrome
computes the factorial of a number
finds the second largest number in a list
sorts a list of dictionaries by a key
counts the vowels in a text
reverses the words of a sentence
merges two dictionaries
removes duplicates from a list and keeps the order
computes the greatest common divisor of two numbers
checks whether two strings are anagrams
reads a CSV file and prints the average of a column
implements binary search
implements a stack with push and pop
implements a queue with two stacks
converts Celsius to Fahrenheit
finds all prime numbers up to n
validates an e-mail address with a regular expression
computes the n-th Fibonacci number with memoization
implements bubble sort
flattens a nested list
finds the longest common prefix of some strings
counts how often each word occurs in a file
rotates a matrix by 90 degrees
computes the depth of a binary tree
implements depth-first search on a graph
implements a simple cache with a maximum size
generates a random password
converts a Roman numeral to an integer
finds the missing number in a list from 1 to n
computes the edit distance of two words""")
langs = ["Python"] * 5 + ["JavaScript", "Java", "C++", "C", "Go", "TypeScript", "Ruby"]
names = lines(
    "Anna\nTom\nMaria\nDavid\nSara\nOmar\nLucy\nBen\nPriya\nCarlos\nEmma\nJack\nNina\nPaul\nGrace\nLeo"
)
goods = lines(
    "apples\npencils\nmarbles\nbooks\ncookies\nstamps\nflowers\nballoons\ntickets\neggs\nbottles of water\nT-shirts"
)
sent = lines("""The weather is beautiful today, so we will have lunch in the garden.
I would like to book a table for two people at eight o'clock.
My brother works in a hospital and often comes home late.
Can you tell me where the nearest train station is?
The children were playing in the park when it started to rain.
She has been studying medicine for four years.
Please send me the documents before Friday.
We missed the bus and had to walk home.
The book that you gave me was very interesting.
How much does this shirt cost?
There is a small museum behind the church.
He forgot his keys and had to wait outside.
The film begins at nine, but we should be there earlier.
I have never eaten such good bread.
They are looking for a house with a big kitchen.
Yesterday my cat slept all day on the sofa.
Next summer we want to travel to the mountains.
The doctor told him to drink more water.""")
tongues = ["French", "Spanish", "German", "Italian", "Portuguese", "Dutch", "French", "Spanish", "German"]
texts = lines("""The town of Elmsford opened a new bicycle bridge on Saturday. It is 140 metres long and cost 3.2 million dollars, most of which came from a state fund. About two thousand people came to the opening. The mayor said that the bridge will save commuters ten minutes a day, while some residents complained about the lack of parking nearby.
Bees are important for agriculture because they pollinate many crops. In recent years the number of bees has fallen in many countries. Scientists name pesticides, diseases and the loss of wild flowers as the main causes. Farmers can help by planting strips of flowers beside their fields and by using fewer chemicals.
The company Northwind reported sales of 48 million euros for the last quarter, 6 percent more than a year before. Profits fell slightly to 4.1 million euros because of higher energy prices. The chief executive, Laura Meyer, expects stable results for the rest of the year and plans to hire 50 engineers.
Samuel was born in a small fishing village in 1932. He left school at fourteen to work on his uncle's boat. At twenty he moved to the city, learned to repair radios, and opened his own shop. He retired in 1997 and wrote a book about his childhood, which became a local success.
Researchers asked 1,200 adults about their sleep. Those who used a phone in bed slept on average 35 minutes less than the others and felt more tired in the morning. The effect was larger for people under thirty. The authors recommend to leave the phone outside of the bedroom.
The Baltic herring lives in shallow water and grows to about 20 centimetres. It feeds on plankton and is eaten by cod, seals and seabirds. Fishing quotas were lowered in 2021 because stocks had shrunk. Since then the numbers have recovered a little, but only in the northern part of the sea.
Our hotel has 64 rooms on four floors. Breakfast is served from 6:30 to 10:00 in the garden room. Guests can use the pool until 9 in the evening. Parking costs 12 dollars a night. Dogs are welcome, but not in the restaurant. The reception is open day and night.
On Monday the council discussed the new school. Ms. Ortega presented two sites: one near the station, and one beside the river. The first is easier to reach, the second is cheaper by two million. The council voted seven to four for the station, and asked for a traffic study until March.
Concrete is made of cement, sand, gravel and water. Making cement releases a lot of carbon dioxide, about eight percent of the world's emissions. Engineers try to replace part of the cement with ash or clay. Others inject carbon dioxide into fresh concrete, which makes it stronger at the same time.
When the power went out, Julia lit three candles and took out a deck of cards. Her brothers complained about the lost football match, but after an hour they were laughing. When the lights came back at ten, nobody got up to turn on the television.
Tea was first drunk in China as a medicine. Monks brought it to Japan, and Dutch merchants to Europe in the seventeenth century. In Britain it became so popular that its tax paid for a tenth of the state's income. Today India and China grow more than half of the world's tea.
The new laptop weighs 1.2 kilograms and has a 14-inch screen. Its battery lasts eleven hours in our test, two more than its predecessor's. The keyboard is quiet and comfortable. We liked less that it has only two ports, and that the memory cannot be extended. It costs 1,099 dollars.""")
questions = [
    "What is the main idea of the text?",
    "Which numbers are mentioned, and what do they mean?",
    "Who or what is the text about?",
    "What reasons are given?",
    "What problem is described?",
    "What happened at the end?",
]
num, pick = RANDOM.randint, RANDOM.choice


def math() -> str:
    n, m, g, k = pick(names), pick(names), pick(goods), num(3, 12)
    a, b = num(4, 60), num(2, 20)
    return pick(
        [
            f"{n} has {a} {g} and buys {b} more. Then {n} gives {num(1, 4)} to each of {num(2, 5)} friends. How many {g} are left?",
            f"A shop sells {g} for ${num(2, 15)} each. How much do {k} of them cost with a discount of {pick([5, 10, 15, 20, 25])}%?",
            f"{n} drives {num(40, 120)} miles in {pick(['1.5', '2', '2.5', '3'])} hours. What is the average speed, and how far does {n} get in {num(4, 8)} hours?",
            f"Solve for x: {num(2, 9)}x + {num(1, 30)} = {num(31, 90)}. Show each step.",
            f"A rectangle is {num(3, 30)} cm long and {num(2, 20)} cm wide. Find its area and perimeter.",
            f"What is {pick([5, 12, 15, 20, 30, 35, 60])}% of {num(40, 900)}? Explain how you found it.",
            f"{n} is {num(2, 9)} years older than {m}. The sum of their ages is {num(20, 60)}. How old are they?",
            f"Find the value of f({num(2, 6)}) if f(x) = {num(2, 5)}x^2 - {num(2, 9)}x + {num(1, 12)}.",
            f"A bag contains {num(2, 8)} red, {num(2, 8)} blue and {num(2, 8)} green balls. What is the probability of drawing a blue ball?",
            f"The sides of a right triangle are {pick(['3 and 4', '6 and 8', '5 and 12', '8 and 15'])}. How long is the hypotenuse?",
            f"Compute the mean and the median of {', '.join(str(num(1, 40)) for _ in range(num(5, 8)))}.",
            f"If {k} workers paint a house in {num(4, 14)} days, how long do {k * 2} workers need?",
            f"How many integers between {num(1, 20)} and {num(60, 200)} are divisible by {num(3, 9)}?",
            f"{n} saves ${num(10, 80)} every week. After how many weeks has {n} saved ${num(300, 2000)}?",
        ]
    )


def reason() -> str:
    n, m, o = RANDOM.sample(names, 3)
    return pick(
        [
            f"{n} is taller than {m}. {m} is taller than {o}. Who is the shortest? Explain.",
            "All roses are flowers. Some flowers fade quickly. Can we conclude that some roses fade quickly? Explain your reasoning.",
            f"{n} sits left of {m}, and {o} sits right of {m}. Who sits in the middle?",
            f"{n}'s mother has three children: two are called {m} and {o}. What is the third child's name?",
            f"If it takes {num(2, 9)} minutes to boil one egg, how long does it take to boil {num(2, 9)} eggs in the same pot? Why?",
            f"Which word does not belong: {pick(['apple, banana, carrot, cherry', 'car, bus, bicycle, tree', 'piano, violin, hammer, flute', 'lion, tiger, eagle, wolf'])}? Explain why.",
            f"A farmer has {num(10, 40)} animals, chickens and cows, with {num(24, 100) * 2} legs together. How many are there of each?",
            f"What is the next number in the series {pick(['2, 4, 8, 16', '1, 1, 2, 3, 5, 8', '3, 6, 9, 12', '1, 4, 9, 16, 25', '100, 90, 81, 73'])}? Explain the rule.",
            "Is the following argument valid? If it rains, the street gets wet. The street is wet. Therefore it has rained.",
            f"You have a {num(3, 9)}-litre jug and a {num(10, 15)}-litre jug. How can you measure different amounts of water with them?",
        ]
    )


def writing() -> str:
    t, p = pick(topics), pick(places)
    return pick(
        [
            f"Write a blog post about a weekend in {p}, with tips for food and sights.",
            f"Write a short story about {pick(story)}.",
            f"Write a persuasive essay about {t}, with an introduction, arguments and a conclusion.",
            f"Draft an email to {pick(people)}, {pick(occ)}.",
            f"Write a product description for {pick(things)} that is friendly and under 150 words.",
            f"Write a poem about {pick([t, p, pick(story)])}.",
            f"Compose a speech of two minutes about {t}.",
            f"Give me ten creative names for {pick(things)} and explain each.",
            f"Write the first paragraph of a novel about {pick(story)}.",
            f"Write a balanced article on the advantages and disadvantages of {t}.",
            f"Write a letter to {pick(people)}, {pick(occ)}. Keep it short and polite.",
            f"Describe a busy market in {p} so that the reader can smell and hear it.",
            f"Write a dialogue between {pick(roles)} and {pick(roles)} about {t}.",
            f"Edit the following text for grammar and style: {pick(['yesterday me and my friend was going to the store for buy some milk but it were closed so we goes home', 'The informations in this report is very importants and needs to be readed by all employee of company', 'she dont know nothing about the problem because nobody have told her when it happen'])}.",
        ]
    )


def roleplay() -> str:
    return pick(
        [
            f"Pretend to be {pick(roles)}. Introduce yourself and tell me about your day.",
            f"You are {pick(roles)}. What is your opinion about {pick(topics)}?",
            f"Act as {pick(roles)} and give me advice: I can't decide whether to change my job.",
            f"Imagine you are {pick(roles)}. Explain {pick(science)} in your own way.",
            f"Take the role of {pick(roles)}. I am a customer who is not satisfied. How do you answer?",
            f"Speak like {pick(roles)} and describe {pick(places)}.",
            f"Embody {pick(roles)} in this conversation. My first question: what makes a good life?",
        ]
    )


def coding() -> str:
    task = pick(code)
    return pick(
        [
            f"Write a {pick(langs)} function that {task}.",
            f"Write a {pick(langs)} program that {task}, with comments.",
            f"Implement in {pick(langs)} a function that {task}. Then explain its time complexity.",
            f"Write a {pick(langs)} function that {task} and show how to test it.",
            f"What is the difference between {pick(['a list and a tuple in Python', 'an array and a linked list', 'TCP and UDP', 'a process and a thread', 'SQL and NoSQL databases', 'git merge and git rebase', 'let and var in JavaScript', 'a class and an object', 'recursion and iteration'])}? Give an example.",
            f"Write a web page in HTML with {pick(['a button that changes the colour of the background', 'a list of three links', 'a table of five countries and their capitals', 'a form for a newsletter', 'a clock that shows the time'])}.",
            f"Write an SQL query that {pick(['lists the ten best customers by sales', 'counts the orders of each month', 'finds employees who earn more than the average', 'joins students with their courses', 'deletes rows that are older than a year'])}.",
        ]
    )


def extraction() -> str:
    t = pick(texts)
    return pick(
        [
            f"Extract all numbers from the following text and say what each one means, as JSON.\n\n{t}",
            f"List the people, places and organizations in this text.\n\n{t}",
            f"Read the text and answer: {pick(questions)}\n\n{t}",
            f"Turn the following text into a table with the columns 'fact' and 'detail'.\n\n{t}",
            f"Classify the tone of the following text as positive, negative or neutral and explain why.\n\n{t}",
            f"Write five questions and answers about this passage.\n\n{t}",
        ]
    )


def summarise() -> str:
    return f"{pick(['Summarize the following text in two sentences.', 'Summarize this text in a short paragraph.', 'What are the key points of this text?', 'Give a brief summary of the passage below.', 'Summarize this article as three bullet points.', 'Explain this text to a child.', 'Write a headline and a one-sentence summary for this text.'])}\n\n{pick(texts)}"


def answer() -> str:
    return f"{pick(['Answer the question using the text below.', 'Use only the passage to answer.', 'Read the passage, then answer the question.'])}\n\nText: {pick(texts)}\n\nQuestion: {pick(questions)}"


def stem() -> str:
    s = pick(science)
    return pick(
        [
            f"Explain {s} to a high school student.",
            f"What is {s}, and why is it important?",
            f"Describe how {s} works, step by step.",
            f"What are common misconceptions about {s}?",
            f"Give an overview of {s} with two examples from everyday life.",
            f"How would you design an experiment to study {s}?",
            f"What is the relation between {s} and {pick(science)}?",
            f"Name three applications of {s} and explain each of them.",
        ]
    )


def humanities() -> str:
    h = pick(hist + human)
    return pick(
        [
            f"What were the main causes and effects of {pick(hist)}?",
            f"Explain {pick(human)} with examples.",
            f"Compare {pick(hist)} and {pick(hist)}.",
            f"Discuss the importance of {h} for today's world.",
            f"Provide insights into {h}, and name some key figures.",
            f"How did {pick(hist)} change the lives of ordinary people?",
            f"What are the arguments for and against {pick(human)}?",
            f"Write a lesson plan for teaching {h} to teenagers.",
        ]
    )


def translate() -> str:
    s, t = pick(sent), pick(tongues)
    return pick(
        [
            f"Translate into {t}: {s}",
            f'How do you say in {t}: "{s}"',
            f"Translate the following sentence into {t} and explain the grammar: {s}",
        ]
    )


def life() -> str:
    t = pick(topics)
    return pick(
        [
            f"What are some tips for {pick(['better sleep', 'saving money', 'a job interview', 'learning a language', 'healthy eating on a budget', 'making new friends', 'moving to a new city', 'staying focused', 'public speaking', 'growing tomatoes', 'planning a birthday party', 'training for a marathon', 'raising a puppy'])}?",
            f"What should I know before I visit {pick(places)}?",
            f"Explain the pros and cons of {t}.",
            f"Give me a recipe for {pick(['lentil soup', 'banana bread', 'a vegetable curry', 'pancakes', 'tomato pasta', 'chocolate cookies', 'roasted chicken', 'a summer salad'])}.",
            f"Who was {pick(['Marie Curie', 'Nelson Mandela', 'Leonardo da Vinci', 'Ada Lovelace', 'Mozart', 'Confucius', 'Frida Kahlo', 'Isaac Newton', 'Rosa Parks', 'Galileo'])}, and why is this person remembered?",
            f"Make a {pick(['weekly', 'daily', 'monthly'])} plan for {pick(['learning Spanish', 'getting fit', 'writing a novel', 'cleaning a house', 'studying for exams'])}.",
        ]
    )


kinds = [
    writing,
    writing,
    roleplay,
    roleplay,
    reason,
    math,
    math,
    coding,
    coding,
    extraction,
    stem,
    stem,
    humanities,
    humanities,
    summarise,
    answer,
    translate,
    life,
]
more = lines("""Can you make it shorter?
Now explain it to a five-year-old.
Give me an example.
Why is that so?
Rewrite your answer as a list of bullet points.
What would be a counterargument?
Can you give more detail on the most important point?
Are you sure? Please check your answer.
Now do the same in a more formal tone.
What should I do next?""")


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
                    turn = pick(more)
                else:
                    turn = kinds[i % len(kinds)]() if j == 0 and attempt < 20 else pick(kinds)()
                if turn in more or turn not in seen:
                    break
            seen.add(turn)
            turns.append(turn)
        found.append(turns)
    return found


if __name__ == "__main__":
    for turns in conversations(960):
        print(json.dumps({"turns": turns}))
